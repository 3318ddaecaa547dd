"""Poison: can a poisoned transfer set put a backdoor into a student whose teacher is clean, and how is it kept out?"""

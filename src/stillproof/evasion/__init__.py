"""Evasion: is a distilled classifier robust, or does it only hide its gradients?"""

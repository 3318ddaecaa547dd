"""Small reference architectures for images from 8×8 to 64×64, with 1 or 3 channels. Input in [0, 1]."""

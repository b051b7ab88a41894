"""Checkpoint directories: what is where, opening weights safely, and weights drawn at random."""

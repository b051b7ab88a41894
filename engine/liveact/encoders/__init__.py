"""The three encoders whose outputs condition the DiT: prompt, portrait and speech.

Each has the tensor names of the released files. `open_…` checks sizes, names and shapes and reads
no weights; the encoder then takes what was opened.
"""

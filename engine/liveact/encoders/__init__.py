"""The three encoders whose outputs condition the DiT: prompt, portrait and speech.

Each is a `transformers` model behind the tensor names of the released files. `transformers` takes
seconds to import, so it is imported when an encoder is loaded and not before.
"""

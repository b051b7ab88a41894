"""The three encoders whose outputs condition the DiT: prompt, portrait and speech.

Each is a `transformers` model behind the tensor names of the released files. `transformers` takes
seconds to import, so it is imported when an encoder is loaded and not before.
"""

from liveact.audio_encoder import AudioEncoder
from liveact.image_encoder import ImageEncoder
from liveact.text_encoder import TextEncoder

__all__ = ["AudioEncoder", "ImageEncoder", "TextEncoder"]

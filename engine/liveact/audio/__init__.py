"""From sound to the features of a block: PCM of any rate in, wav2vec2 features out."""

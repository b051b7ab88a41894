"""The Wan 2.1 video autoencoder, streaming: weights, streams, and the y of a portrait."""

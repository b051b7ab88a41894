"""The DiT on the C++ runtime: its weights, a session's stream, and the format of each product."""

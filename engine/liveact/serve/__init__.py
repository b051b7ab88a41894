"""`liveact serve`: sessions over HTTP, WebSocket and WebRTC (`liveact-engine[serve]`).

Uses the engine and its sessions; nothing else of the package imports it.
"""

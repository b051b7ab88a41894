"""The commands of `liveact`: one module each, with `run(options)`."""

"""Media files: the portrait in, the audio of a file in, the mp4 out.

Everything a user can get wrong raises InputError with the name of the file. Sound and film are
streams through PyAV with bounded memory.
"""

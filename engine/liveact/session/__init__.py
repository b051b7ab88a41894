"""A session: audio goes in, chunks of video come out, two workers in between."""

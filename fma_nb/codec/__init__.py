"""From the bytes of an audio file to its samples; it imports nothing from the rest of the package."""

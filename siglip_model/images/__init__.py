"""Images to pixel values: opening files, accepted inputs, and the Pillow and torch image processors."""

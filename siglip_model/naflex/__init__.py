"""SigLIP 2 at native resolution (NaFlex; Tschannen et al. 2025, arXiv 2502.14786, section 2.4.2).

An image keeps its aspect ratio: it is a sequence of patches, of which each image of a batch has another number.
"""

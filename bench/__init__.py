"""Benchmarks of SigLIP's operations and models against the strongest peers: `python -m bench`."""

"""SigLIP's operations and models side by side with the strongest peers: `python -m bench`."""

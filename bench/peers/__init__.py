"""Who is compared: `registry.py` says what an entry is; the other files hold the entries, by kind of operation."""

from bench.peers.registry import Missing, Peer, Unsupported, names, peer, peers_of, registry

__all__ = ["Missing", "Peer", "Unsupported", "names", "peer", "peers_of", "registry"]

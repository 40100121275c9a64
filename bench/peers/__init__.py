"""The contenders: `registry.py` defines an entry; the other files hold the entries, by kind of operation."""

from bench.peers.registry import Missing, Peer, Unsupported, everyone, names, peer, peers_of

__all__ = ["Missing", "Peer", "Unsupported", "everyone", "names", "peer", "peers_of"]

"""The network, how it is trained, and how good it is."""

"""Mixtures of experts: all that a layer does, its router too, in two launches."""

"""Layers that keep a state for each sequence: state-space layers, linear attention, short convolutions."""

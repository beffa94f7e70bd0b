"""Constrained decoding: response formats become grammars, and grammars say which tokens may come next."""

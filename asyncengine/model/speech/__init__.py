"""Models that write down what they hear, and attend to it beside their own tokens: encoder-decoder models (Whisper)."""

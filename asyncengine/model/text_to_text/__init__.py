"""Models that write one text of another and attend to it beside their own tokens: translators and summarisers."""

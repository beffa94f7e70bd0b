"""What models have in common whose decoder attends to what an encoder gives out, beside its own tokens (Vaswani et al.,
2017): to audio (`asyncengine.model.speech`) or to a text (`asyncengine.model.text_to_text`).
"""

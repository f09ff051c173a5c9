"""From a prompt to what the U-Net listens to: token ids (tokenizer), chunks and emphasis (prompt), features (encode).

Nothing is imported here, so that `calotype.text.prompt` stays free of torch.
"""

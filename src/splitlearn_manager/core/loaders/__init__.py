"""Readers of model files: each turns what is behind a `model_path` into an `nn.Module`.

    pytorch.py       checkpoints by content (torch.save, TorchScript, torch.export, safetensors)
    huggingface.py   a directory with a config.json and weights, or a repository of the hub (hub.py)
    custom.py        a function of the user's own code (user_code.py)

Nothing that an untrusted file contains is run as code; see `docs/loaders.md` for the rule.
"""

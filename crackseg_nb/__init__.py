__version__ = "0.2.0"


def __getattr__(name: str):
    "Import `predict` when it is first asked for: `import crackseg_nb` loads nothing else."
    if name == "predict":
        from crackseg_nb.inference.prediction import predict

        return predict
    raise AttributeError(f"module 'crackseg_nb' has no attribute {name!r}")

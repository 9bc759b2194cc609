import importlib, importlib.util
def load(package,name,attribute): return getattr(importlib.import_module(f"{package}.{name}"),attribute)
def names(p): return {}

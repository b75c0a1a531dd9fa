from importlib.util import find_spec
def why_not(q, k, v, block_mask):
    if find_spec("triton") is None:
        return "Triton is not installed"
    return "not built yet"

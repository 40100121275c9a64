"""The kernels inside existing models of `transformers`, `open_clip` and `timm`. Each module imports only its library
and changes nothing until one of its functions is called.

`siglip_kernel` has the names of that package's losses.

`accelerate(model)` changes instances and returns a report of what it changed; `restore(model)` undoes it.
"""

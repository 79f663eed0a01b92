"""The commands, one module or package each; `vit_jax.__main__` lists the module that runs each."""

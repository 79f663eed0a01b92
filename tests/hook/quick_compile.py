"""Reduces the time in which XLA compiles the CPU programs of most tests.

Where JAX 0.10 disables LLVM's optimizations, fusions are compiled by XLA's older emitters, which
differ from the newer ones by rounding alone.
"""


def install():
    """Enables the faster compilation in this process."""
    import jax
    from jax._src import compiler

    if jax.__version_info__ >= (0, 11):  # jax 0.12 has no older emitters
        return
    get_compile_options = compiler.get_compile_options
    if get_compile_options.__module__ == __name__:  # sitecustomize has installed it
        return

    def quick(*args, **kwargs):
        options = get_compile_options(*args, **kwargs)
        if compiler._DISABLE_MOST_OPTIMIZATIONS.value:
            option = ("xla_cpu_use_fusion_emitters", False)
            options.env_option_overrides = [*options.env_option_overrides, option]
        return options

    compiler.get_compile_options = quick

"""XLA's flags, in a module that may be imported before JAX is."""

from jaxlib.version import __version_info__

# Of the tests' own process, and of those that they start and whose compiler does not matter. An
# unknown flag ends a process: from jaxlib 0.11 on XLA has no other way to fuse.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * (__version_info__ < (0, 11))
)

"""XLA's flags, in a module that may be imported before JAX is."""

# Of the tests' own process, and of those that they start and whose compiler does not matter.
QUICK_COMPILES = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

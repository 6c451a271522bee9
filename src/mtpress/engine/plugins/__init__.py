"""Code that vLLM loads into its own process: CPU kernels, the reasoning parser, the probe of a launch."""

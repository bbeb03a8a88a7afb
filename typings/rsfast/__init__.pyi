# Read by mypy alone: beside this file lies a link to kernels/, under the name it is imported by.
# Everything else of rsfast is found in rsfast/.

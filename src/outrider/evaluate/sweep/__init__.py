"""Many measurements as data: a plan file becomes cells, executors perform them, and the driver alone writes what they found."""

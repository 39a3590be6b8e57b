"""The job under torchrunx, which starts the ranks from within the script: https://torchrun.xyz.

python torchrunx_loop.py --world_size 2
"""

import job
import torchrunx

if __name__ == "__main__":
    args = job.arguments()
    launcher = torchrunx.Launcher(
        hostnames=["localhost"],
        workers_per_host=args.world_size,
        backend="gloo",
        copy_env_vars=(*torchrunx.DEFAULT_ENV_VARS_FOR_COPY, "LAUNCHLAB*", "OMP*"),
    )
    launcher.run(job.run, args.threads, args.steps)

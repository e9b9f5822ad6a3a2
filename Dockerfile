# What every node of a cluster runs: Ray's own image, and this package with the versions it was tested with.
# docs/cluster.md says how it is built and who uses it. `-gpu` has the compiler that FlexAttention's kernels need.
FROM rayproject/ray:2.60.0-py311-gpu

# made by the image's user, who installs from there; WORKDIR alone would make it root's
RUN mkdir /home/ray/ray_sql
WORKDIR /home/ray/ray_sql
# named one by one: whatever else lies in the folder (runs, data, tokens) stays out of the image
COPY --chown=ray pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray ray_sql ray_sql
COPY --chown=ray jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt --editable .

# The programs in an image, with the package versions of constraints.txt:
#
#   docker build -t ntm_jax .                          # CPU
#   docker build -t ntm_jax:tpu --build-arg EXTRA=tpu .
#   docker build -t ntm_jax:cuda --build-arg EXTRA=cuda .
#   docker run --rm -v "$PWD/runs:/ntm_jax/runs" ntm_jax \
#     python -m launch.train --config=digits --workdir=runs/digits
#
# EXTRA: extras of pyproject.toml, separated by commas. RUN_AS: the user, 1000 by default; root where
# the accelerator's device files belong to root.
FROM python:3.11-slim

ARG EXTRA=""
ARG RUN_AS=1000
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /ntm_jax
RUN useradd --uid 1000 --create-home ntm && chown ntm /ntm_jax

# The requirements are a layer of their own, which a change of the code does not rebuild.
COPY constraints.txt pyproject.toml ./
RUN python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); \
names = [name for name in sys.argv[1].split(',') if name]; \
extras = [p['project']['optional-dependencies'][name] for name in names]; \
print(*p['build-system']['requires'], *p['project']['dependencies'], *sum(extras, []), sep='\n')" \
"$EXTRA" > /tmp/requirements.txt && pip install -c constraints.txt -r /tmp/requirements.txt

COPY setup.py README.md LICENSE NOTICE ./
COPY ntm_jax ntm_jax
COPY launch launch
COPY experiments experiments
RUN pip install --no-deps --no-build-isolation -e .

USER ${RUN_AS}
CMD ["python", "-m", "launch.train", "--help"]

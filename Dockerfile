# The locked environment with the project in it: docker build -t cxr_nb . ; then, for a GPU,
# docker run --gpus all -v "$PWD/data:/cxr_nb/data" -v "$PWD/outputs:/cxr_nb/outputs" cxr_nb make report PROFILE=public
FROM python:3.12-slim

# make and git: what the project is run and recorded by; chromium: the page as a PDF, and the tests that look at it
RUN apt-get update && apt-get install -y --no-install-recommends make git chromium && rm -rf /var/lib/apt/lists/*

WORKDIR /cxr_nb
# the environment is made anew only where one of these changes
COPY Makefile requirements.lock settings.ini setup.py README.md MANIFEST.in ./
COPY cxr_nb cxr_nb
COPY nbs nbs
RUN make env

# the history is copied too: a record names the commit of the code
COPY . .
# weights that are fetched stay where a volume can keep them
ENV HF_HOME=/cxr_nb/data/huggingface TORCH_HOME=/cxr_nb/data/torch
CMD ["make", "help"]

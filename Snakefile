# The graph of notebooks. papermill runs each with its section of a profile; it runs again when the notebook, a module
# it imports, its section or a file it reads has changed. Called by `make report`, `make benchmarks` and `make ablations`.
import os
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from cxr_nb import places, profiles, report, runner

# with the file's suffix where the name alone would read as a number, as Snakemake reads it
PROFILE = str(config.get("profile", "demo")).removesuffix(".yaml")
OUT = os.path.relpath(places.outputs_dir(PROFILE))
# small models gain little from a second thread; on a GPU notebooks would share its memory
AT_ONCE = 1 if shutil.which("nvidia-smi") else 2
try:
    PARAMETERS = {name: profiles.resolve_parameters(name, PROFILE) for name in profiles.load_profile(PROFILE)}
    if wrong := report.unfitting(PROFILE): raise ValueError("\n".join(wrong))
except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
    raise WorkflowError(error.args[-1])

text = PARAMETERS["24_text_encoder"]
ENCODERS = [places.slug(line.partition("=")[0]) for line in text["encoders"]] + ["tf_idf_svd"] * bool(text["svd_components"])
EMBEDDINGS = [f"measures/text_embeddings_{name}.parquet" for name in ENCODERS]
FIGURES = [f for f in ("figure_6", "figure_7", "figure_8") if PARAMETERS["B_text_clusters"][f]]
# what file names of each text source end with, as datasets.text_sets has it
SETS = ["", *(f"_{places.slug(line.partition('=')[0])}" for line in PARAMETERS["21_datasets"]["text_sources"][1:])]


def figures(*names): return [f"figures/{name}.{kind}" for name in names for kind in ("png", "svg")]


def sheets(*names): return [f"figures/{name}.webp" for name in names]


def of_sets(name, *kinds): return [f"{name}{of}.{kind}" for of in SETS for kind in kinds]


def cohorts():
    "What 21_datasets writes, which depends on the data sets the profile names."
    data = PARAMETERS["21_datasets"]
    keys = {"chexpert": "chexpert", "mimic_cxr": "mimic_cxr", "openi_images": "open_i", "nih": "nih_chestx_ray14"}
    own = [places.slug(line.partition("=")[0]) for line in data["folders"]]
    images = [name for key, name in keys.items() if data[key]] + own
    files = ["sources.json", *(f"{name}{of}.csv" for name in ("text_reports", "text_evaluation", "text_evaluation_classes") for of in SETS)]
    files += [f"{name}.csv" for name in dict.fromkeys(["open_i", "nih_chestx_ray14", *images])]
    files += [f"{name}_sample.csv" for name in images]
    files += ["few_shot_candidates.csv", "few_shot.csv"] * bool(data["few_shot_source"]) + ["captions.parquet"] * bool(data["laion_400m"])
    drawn = ["cohort_labels", "cohort_patients", "cohort_cooccurrence", "text_evaluation_classes"]
    shown = [f"cohort_sample_{name}" for name in images] + ["few_shot_candidates"] * bool(data["few_shot_source"])
    return [f"cohorts/{file}" for file in files] + ["tables/cohorts.csv", *figures(*drawn), *sheets(*shown)]


ADAPTATIONS = "25_textual_projection", "26_textual_inversion", "27_unet_finetuning"
MADE = Path("cxr_nb/miniature/made.json")


def drawn(method, variants, prompts, n):
    "Images a notebook draws, below images/<method>/<variant>/<prompt>."
    folders = [f"images/{method}/{places.slug(variant)}/{places.slug(prompt)}" for variant in variants for prompt in prompts]
    return [f"{folder}/{i:04}.png" for folder in folders for i in range(n)]


def original_images():
    "What 22_stable_diffusion samples."
    own = PARAMETERS["22_stable_diffusion"]
    names = [f"{places.slug(prompt)}/{i:04}.png" for prompt in own["prompts"] for i in range(own["images_per_prompt"])]
    return [f"images/original/{name}" for name in names]


# What is trained (models/, training/) is no output here: Snakemake would delete it before a job and after a failure.
# Notebooks find it by what it was made of, and train what is missing; their records hold its hashes (cxr_nb report).
def adaptation_graph():
    "The three ways to adapt the model and what they draw, where the profile has images to adapt it to."
    if not PARAMETERS["21_datasets"]["few_shot_source"]: return {}
    projection, inversion, unet = (PARAMETERS[name] for name in ADAPTATIONS)
    few_shot = ["cohorts/sources.json", "cohorts/few_shot.csv"]
    phantoms = ["images/phantoms/truth.json"] * bool(phantoms_in("folders"))
    images = {
        "25_textual_projection": drawn("textual_projection", projection["drawn"], projection["prompts"], projection["images_per_prompt"]),
        "26_textual_inversion": drawn("textual_inversion", inversion["variants"], inversion["prompts"], inversion["images_per_prompt"]),
        "27_unet_finetuning": drawn("unet", unet["variants"], [unet["no_finding_prompt"], unet["effusion_prompt"]], unet["images_per_prompt"]),
    }
    records = [f"records/{name}.json" for name in ADAPTATIONS]
    return {
        "25_textual_projection": (
            ["cohorts/captions.parquet"] * (projection["captions"] == "cohort"),
            ["tables/textual_projection.csv", *figures("textual_projection_loss"), *sheets("textual_projection_along"), *images["25_textual_projection"]],
        ),
        "26_textual_inversion": (
            [*few_shot, *phantoms],
            [*figures("textual_inversion_loss"), *sheets("textual_inversion_along"), *images["26_textual_inversion"]],
        ),
        "27_unet_finetuning": (
            [*few_shot, *phantoms],
            [*figures("unet_losses"), *sheets("few_shot", "unet_along_training", "images_unet"), *images["27_unet_finetuning"]],
        ),
        "31_training_details": (records, ["tables/training_details.csv"]),
        "10_introduction": (
            ["records/22_stable_diffusion.json", "records/27_unet_finetuning.json", "records/28_classification.json", *original_images(), *images["27_unet_finetuning"]],
            ["figures/figure_1.png"],
        ),
        **results_graph([*records, *original_images(), *(image for own in images.values() for image in own)]),
        "E_ablations": ablations([*few_shot, *phantoms]),
    }


def ablations(few_shot):
    "What E_ablations reads and writes: the U-Nets that 27_unet_finetuning trained, trained and sampled in other ways."
    own = PARAMETERS["E_ablations"]
    cohort = [f"cohorts/{places.slug(PARAMETERS['21_datasets']['few_shot_source'])}.csv"]
    records = [f"records/{name}.json" for name in ("27_unet_finetuning", "28_classification", "33_text_encoder_results")]
    features = f"measures/generated_features_{places.slug(Path(own['extractor']).name)}.parquet"
    texts = [*of_sets("cohorts/text_evaluation", "csv"), "measures/bag_of_words.parquet", *EMBEDDINGS]
    varied = ["runs", "few_shot_images", "training_steps", "prior_weight", "guidance_scale", "sampler_steps"]
    tables = [f"tables/{name}.csv" for name in ("ablations", "ablation_seeds")]
    drawn = [*sheets(*(f"ablation_{name}" for name in varied)), "figures/ablation_chexpert_k.png"]
    return [*few_shot, *cohort, *records, features, *texts], [*tables, *drawn]


def results_graph(pictures):
    "What is measured on the images that were drawn (§§2.8, 3.4, 3.5)."
    own, source = PARAMETERS["28_classification"], places.slug(PARAMETERS["28_classification"]["source"])
    judges, kinds = ([places.slug(Path(name).name) for name in own[key]] for key in ("judges", "extractors"))
    real = ["cohorts/sources.json", "cohorts/few_shot.csv", f"cohorts/{source}.csv"] * bool(source)
    measured = ["measures/generated_probabilities.parquet", *(f"measures/generated_features_{kind}.parquet" for kind in kinds)]
    read = ["records/28_classification.json", *measured]
    main = places.slug(Path(PARAMETERS["35_classification_results"]["judge"]).name)
    tables = ["table_5", *(f"table_5_{judge}" for judge in judges if judge != main), "classification_thresholds"]
    tables += ["judges_compared"] * (len(judges) > 1) + ["domain_gap"] * bool(source)
    rebuilt = [f"measures/reconstruction_features_{kind}.parquet" for kind in kinds] * bool(source)
    curves = ["classification_roc", "classification_thresholds", *["domain_gap"] * bool(source)]
    compared = ["table_4", "table_4_extended", "table_4_ranks"]
    return {
        "28_classification": (["records/22_stable_diffusion.json", *pictures, *real], measured),
        "34_generation_results": (
            read,
            [*(f"tables/{name}.csv" for name in compared), "measures/generated_nearest.parquet",
             "figures/figure_4.png", "figures/figure_5.png", *sheets("nearest_training_images"), *figures("generation_measures")],
        ),
        "35_classification_results": (
            [*read, *rebuilt], [*(f"tables/{name}.csv" for name in tables), *figures(*curves), "figures/classification_scores.png", *sheets("classification_extremes")],
        ),
    }


def discussion_graph(graph):
    "The verdicts, which rest on the tables and records of all the rest."
    if "35_classification_results" not in graph: return {}
    results = [name for name in graph if name[:2] in ("25", "31", "32", "33", "34", "35", "A_")]
    tables = [file for name in results for file in graph[name][1] if file.startswith("tables/")]
    records = [f"records/{name}.json" for name in graph if name[0] in "23AC"]
    source = PARAMETERS["32_autoencoder_results"]["source"]
    by_label = ["measures/reconstruction.parquet", f"cohorts/{places.slug(source)}_sample.csv"] * ("32_autoencoder_results" in graph)
    made = ["tables/claims.csv", *["tables/reconstruction_by_label.csv"] * bool(by_label), *figures("claims")]
    return {"40_discussion": ([*tables, *records, *by_label], made)}


def autoencoder_graph():
    "The study of the VAE, where the profile has radiographs for it."
    own = PARAMETERS["23_autoencoder"]
    if not own["sources"]: return {}
    cohort = ["cohorts/sources.json", *(f"cohorts/{places.slug(source)}_sample.csv" for source in own["sources"])]
    pairs = [f"measures/reconstruction{kind}.parquet" for kind in ("", "_probabilities", "_similarity")]
    sets = [f"measures/reconstruction_features_{places.slug(Path(name).name)}.parquet" for name in own["extractors"]]
    shown = [
        f"images/autoencoder/{places.slug(source)}/{side}/{i:04}.png"
        for source in own["sources"] for side in ("original", "reconstruction") for i in range(own["examples"])
    ]
    drawn = [*figures("figure_3", "reconstruction_by_size"), *sheets("reconstruction_examples")]
    tables = ["table_1", "reconstruction", "reconstruction_by_size", "reconstruction_distances"]
    made = [*pairs, *sets, "records/23_autoencoder.json", *cohort[1:]]
    phantoms = ["images/phantoms/truth.json"] * bool(phantoms_in("folders"))
    return {
        "23_autoencoder": ([*cohort, *phantoms], [*pairs, *sets, *shown]),
        "32_autoencoder_results": ([*made, *shown], [*(f"tables/{name}.csv" for name in tables), *drawn]),
        "A_chexpert_reconstruction": (made, ["tables/table_6.csv", "tables/reconstruction_chexpert.csv"]),
    }


def phantoms_in(name):
    "What a parameter that names folders reads of 03_phantoms."
    named = [line.replace(" ", "").partition("=")[2] for line in PARAMETERS["21_datasets"][name]]
    return [f"{place}/phantoms.csv" for place in ("images/phantoms", "images/phantom_reports") if place in named]


# run by a command of their own, and no part of the report
APART = list(report.APART.values())

# notebook: (files it reads, files it writes), below outputs/<profile>
GRAPH = {
    "03_phantoms": ([], ["images/phantoms/phantoms.csv", "images/phantoms/truth.json", "images/phantom_reports/phantoms.csv", *sheets("phantoms", "phantom_findings")]),
    "21_datasets": (
        [*phantoms_in("folders"), *phantoms_in("text_sources")],
        cohorts(),
    ),
    "22_stable_diffusion": ([], [*figures("figure_2"), *original_images(), *(sheets("images_original") if original_images() else [])]),
    "24_text_encoder": (
        ["cohorts/sources.json", *of_sets("cohorts/text_reports", "csv"), *of_sets("cohorts/text_evaluation", "csv")],
        ["measures/text_encoders.json", "measures/bag_of_words.parquet", *EMBEDDINGS],
    ),
    "33_text_encoder_results": (
        [
            "cohorts/sources.json", *of_sets("cohorts/text_reports", "csv"), *of_sets("cohorts/text_evaluation", "csv"),
            *of_sets("cohorts/text_evaluation_classes", "csv"),
            "records/21_datasets.json", "measures/text_encoders.json", "measures/bag_of_words.parquet", *EMBEDDINGS,
        ],
        [
            "measures/chexpert_at_k.parquet", *of_sets("tables/table_2", "csv"), *of_sets("tables/table_3", "csv"),
            *of_sets("tables/evaluation_set_draws", "csv"), *of_sets("figures/chexpert_at_k", "png", "svg"),
        ],
    ),
    "B_text_clusters": (
        [
            "cohorts/sources.json", *of_sets("cohorts/text_evaluation", "csv"), "measures/chexpert_at_k.parquet",
            "measures/bag_of_words.parquet", *EMBEDDINGS,
        ],
        ["measures/tsne.parquet", *of_sets("figures/tsne", "png"), *figures(*FIGURES)],
    ),
    "C_miniature": ([], ["measures/miniature_effusion.parquet", "tables/miniature.csv", *figures("miniature_losses"), *sheets("miniature_prompts")]),
    "D_benchmarks": (["cohorts/sources.json", "cohorts/text_evaluation.csv"], ["tables/benchmarks.csv"]),
    **autoencoder_graph(),
    **adaptation_graph(),
}
GRAPH |= discussion_graph(GRAPH)

# the page reads every table, figure and record of the report; what is measured apart it shows where it is there
REPORT = [name for name in GRAPH if name not in APART]
SHOWN = [file for name in REPORT for file in (*GRAPH[name][1], f"records/{name}.json") if file.startswith(("tables/", "figures/", "records/"))]
GRAPH["F_page"] = SHOWN, ["report.html"]
# no inputs, which the report would make anew, but a new one asks for a new page
APART_RECORDS = [Path(f"{OUT}/records/{name}.json") for name in APART]

# files a person edits: named by a parameter, the claims and their rules, the page's template and words
EDITED = {
    **{name: ["cxr_nb/published/claims.csv"] for name in ("10_introduction", "40_discussion")},
    "F_page": ["cxr_nb/templates/report.html", "cxr_nb/templates/report.yaml"],
    "21_datasets": [
        str(places.find_path(PARAMETERS["21_datasets"][key]))
        for key in ("few_shot_choice", "reference_labels") if PARAMETERS["21_datasets"][key]
    ],
}

# a model that was made anew reruns what uses it
for name, section in PARAMETERS.items():
    if "cxr_nb/miniature" in str(section): EDITED.setdefault(name, []).append(str(MADE))
for name in ADAPTATIONS: EDITED.setdefault(name, []).append(str(MADE.parent / "tuning.csv"))

for name in GRAPH:
    if name not in PARAMETERS:
        raise WorkflowError(f"profile '{PROFILE}': section {name} is missing")


def products(name): return [f"{OUT}/{file}" for file in (*GRAPH[name][1], f"records/{name}.json", f"notebooks/{name}.ipynb")]


# all files are asked for, not the records alone: a fresh clone has the committed ones and lacks the rest
rule report:
    input: [file for name in GRAPH if name not in APART for file in products(name)]

rule benchmarks:
    input: products("D_benchmarks")

if "E_ablations" in GRAPH:
    rule ablations:
        input: products("E_ablations")

for name, (reads, _) in GRAPH.items():
    rule:
        name: f"notebook_{name}"
        input:
            modules=[f"cxr_nb/{module}.py" for module in runner.imported_modules(name)],
            upstream=[f"{OUT}/{file}" for file in reads],
            edited=EDITED.get(name, []),
        output: products(name)
        message: f"notebook {name}"
        params:
            name=name,
            # neither its prose nor outputs that were saved in it change what a notebook computes
            code=runner.code_hash(name),
            parameters=PARAMETERS[name],
            apart=[places.sha256(path) for path in APART_RECORDS if path.exists()] if name == "F_page" else [],
            command=Path(sys.executable).parent / "cxr_nb",
        threads: max(1, workflow.cores // AT_ONCE)
        # what takes longest begins first, and all that it waits for
        priority: int(name in ("03_phantoms", "21_datasets", "27_unet_finetuning"))
        shell: "{params.command:q} run {params.name} --profile {PROFILE}"

"""Views to explore with in JupyterLab (notebook 08): cases, embeddings, samplers at work, training films."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "case": ["CaseViewer"],
        "cohort": ["CohortExplorer"],
        "linked": ["DistanceMap", "EmbeddingExplorer"],
        "panels": ["show"],
        "predictions": ["CasePredictions", "Cases"],
        "samplers_and_film": ["FilmPlayer", "SamplersAtWork", "read_films"],
        "volumes": ["show_itkwidgets"],
        "voxels": ["save_voxels", "voxels_table"],
        "workbench": ["Neighbours", "Workbench"],
    },
)

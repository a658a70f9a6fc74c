"""Views to explore with in JupyterLab (notebook 08): cases, embeddings, samplers at work, training films."""

from mupkg import lazily

__getattr__ = lazily(
    __name__,
    {
        "panels": ["CaseViewer", "DistanceMap", "show"],
        "predictions": ["CasePredictions", "Cases"],
        "samplers_and_film": ["FilmPlayer", "SamplersAtWork", "read_films"],
        "scatters": ["CohortExplorer"],
        "volumes": ["show_itkwidgets"],
        "voxels": ["save_voxels", "voxels_table"],
        "workbench": ["EmbeddingExplorer", "Workbench"],
    },
)

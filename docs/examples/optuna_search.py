"""Search the learning rate and the momentum of a recipe with Optuna, on this machine and without a network.

    pip install optuna
    python docs/examples/optuna_search.py

The same command goes on where it was stopped: finished trials are in search.db. The seed and the scored items of a search choose the
settings, so train the best ones again with other seeds before a number is reported.
"""

import optuna

import glpretrain

RECIPE, STEPS, TRIALS, SCORE = "mmc", 300, 20, "linear"


def score_of(trial: optuna.Trial) -> float:
    settings = {
        "model.init_args.optimization.lr.base": trial.suggest_float("lr", 3e-4, 1e-2, log=True),
        "model.init_args.momentum.base": trial.suggest_float("momentum", 0.8, 0.99),
    }
    overrides = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    run = glpretrain.fit(RECIPE, max_steps=STEPS, seed=0, runs="searched", overrides=overrides)
    return run.results["after"][SCORE]


if __name__ == "__main__":
    study = optuna.create_study(study_name=RECIPE, storage="sqlite:///search.db", direction="maximize", load_if_exists=True)
    study.optimize(score_of, n_trials=TRIALS, catch=ValueError)  # such as a loss that is no longer finite: that trial has failed
    print(f"best {SCORE}: {study.best_value:.1f} with {study.best_params}")

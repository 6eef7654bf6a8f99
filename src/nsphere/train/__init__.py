"""Training: one run, on one rank or many, from its configuration to its result.

the run         loop.py, and in it trainer.py takes a step: precision.py, optimizer.py, muon.py, schedule.py,
                gradients.py
what it is      config.py, arms.py; run_folder.py is what it leaves, saved.py reads it back
data            data.py, from texts.py (corpus.py is the embedded one) or token_files.py, by tokenizer.py and
                token_cache.py, to batches.py
checkpoints     checkpoint/; model_state.py has the names of tensors; files.py survives kills
numbers         metrics.py, evaluation.py, inspection.py, timing.py; progress.py shows them
ranks           distributed.py, ranks.py, roll_call.py; parallelize.py and initial.py spread the model, scaling.py plans
the process     job.py, signals.py, machine.py, compile_cache.py
"""

"""The mathematics of diffusion: tensors and functions that know no network, no trainer and no file.

| module | answers |
|---|---|
| `schedule` | how much signal and noise ``x_t`` holds, and which pairs ``(t, t_prev)`` a chain walks |
| `prediction` | what a network output says about ``x0`` and ``eps`` |
| `weighting` | how much the loss at each noise level counts |
| `samplers` | how ``x`` at ``t`` becomes ``x`` at ``t_prev`` |
| `guidance` | how the predictions under several conditions become one |
| `noise` | which random numbers a sample gets |
"""

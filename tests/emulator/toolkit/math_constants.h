// Stand-in for CUDA's header of the same name.
#pragma once

#define CUDART_INF_F __builtin_inff()
#define CUDART_LN2_F 0.693147180559945309f
#define CUDART_L2E_F 1.442695040888963407f

/* The version of the runtime, the C interface and the Python package: its only source, which the
 * builds read. C and C++. */
#ifndef LIVEACT_VERSION_H
#define LIVEACT_VERSION_H

#define LIVEACT_VERSION_MAJOR 0
#define LIVEACT_VERSION_MINOR 2
#define LIVEACT_VERSION_PATCH 0
#define LIVEACT_VERSION "0.2.0"

#endif

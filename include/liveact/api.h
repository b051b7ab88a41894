/* What the shared library exports. C and C++. */
#ifndef LIVEACT_API_H
#define LIVEACT_API_H

#define LIVEACT_API __attribute__((visibility("default")))
#define LIVEACT_LOCAL                                                         \
  __attribute__((visibility("hidden"))) /* a part of a class that is exported \
                                         */

#endif

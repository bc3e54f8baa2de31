// Options of the sockets that lanes and control use. What is set here and why is measured: docs/adr/0006 and
// 0008.
#pragma once

namespace kvt::backends {

/// Small frames leave at once, and loopback isn't paced. Never fails: what a kernel refuses stays as it was.
void tune_control(int fd);

/// The same, and buffers: `buffer_nbytes` each way, or (0) what suits loopback, or between hosts the
/// system's.
void tune_lane(int fd, int buffer_nbytes);

}  // namespace kvt::backends
